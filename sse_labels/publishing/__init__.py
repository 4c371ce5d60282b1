"""Publishing: who may publish labels, checking and storing labels, and signing them."""

"""Notices of labels that expire, for the streams that ask for them."""

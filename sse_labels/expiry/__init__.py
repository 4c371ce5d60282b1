"""Notices of expired labels, for the streams that ask for them."""

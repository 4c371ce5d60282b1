"""Code that several test modules share and that is not a fixture."""

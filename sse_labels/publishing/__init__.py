"""Who may publish, what is published, and how it is signed."""

"""What is reused, in which order and by which strategy; it runs no model itself."""

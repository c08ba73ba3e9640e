"""What the bytes of a weight mean."""

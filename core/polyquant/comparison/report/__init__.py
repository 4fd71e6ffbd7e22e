"""What a comparison is shown as."""

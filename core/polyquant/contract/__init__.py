"""What a plugin answers: the hook specification."""

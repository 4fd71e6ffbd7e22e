"""The installed backends: found, checked, asked."""

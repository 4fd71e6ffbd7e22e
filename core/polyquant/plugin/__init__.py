"""What a backend plugin is written with; plugins import this package, `polyquant.errors` and `polyquant.testing`."""

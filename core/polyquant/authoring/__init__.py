"""For backend authors: a package to start from (`polyquant new-backend`), and what to do where a check fails."""

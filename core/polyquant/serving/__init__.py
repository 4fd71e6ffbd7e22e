"""A loaded model behind OpenAI's HTTP interface."""

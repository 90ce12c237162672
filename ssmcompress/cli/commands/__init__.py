"""One module per command: it builds the request, calls one job, and shows the result."""

"""Each kernel against its bound (memory or arithmetic) and the best library operation: `python -m loadtest.micro`."""

"""Weight formats that other tools read and write."""

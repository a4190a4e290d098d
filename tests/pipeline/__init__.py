"""The whole path, from a file of rows on."""

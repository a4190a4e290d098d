"""Tests of rows, formats, tokenisation and truncation."""

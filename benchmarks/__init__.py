"""Measure: speed and quality, with hardware, commit and versions in every result."""

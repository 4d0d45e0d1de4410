"""Draw what a run did."""

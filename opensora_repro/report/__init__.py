"""What finished runs tell: pages, and which clips made a checkpoint."""

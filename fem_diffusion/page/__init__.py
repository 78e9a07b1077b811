"""What pages share: numbers in words, pictures inside the page, one look; neither Firedrake nor torch."""

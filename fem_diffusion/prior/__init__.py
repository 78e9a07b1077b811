"""Prior distributions of unknown fields."""

"""What a network costs, how fast it runs here, and a drawing of it."""

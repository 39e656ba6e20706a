"""Which techniques pay, and does the gain survive width? Arms with and without each, at the best rate of each arm."""

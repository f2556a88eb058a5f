"""The choice of settings: plan, race, search space, sensitivity, capacity, split."""

"""The values that everything else speaks of: requests, token estimates, policy and settings, keyed chance, prices,
pools."""

"""Values that every other room uses: requests, token estimates, policy, settings, keyed chance, prices and pools."""

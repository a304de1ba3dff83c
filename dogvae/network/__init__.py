"""The network, its likelihoods and its priors."""

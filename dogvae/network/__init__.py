"""The network, its likelihoods and priors."""

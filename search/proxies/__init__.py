"""Zero-cost proxies: how good a model may become, from one minibatch before it is trained."""

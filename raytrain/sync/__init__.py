"""How replicas stay together: a transport moves tensors, an exchange averages, a synchroniser decides when."""

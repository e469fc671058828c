-- Known models and the digests of their metadata.
return call('HGETALL', DIGESTS)

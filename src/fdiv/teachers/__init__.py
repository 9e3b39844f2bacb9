"""What a teacher knows about a batch of tokens: from its weights in memory, a cache on disk, or a server."""

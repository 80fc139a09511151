"""What several machines share behind their folders: object storage, Redis."""

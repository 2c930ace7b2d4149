"""shard_builder: packs an archive of medical images into WebDataset tar shards; needs numpy and Pillow only."""

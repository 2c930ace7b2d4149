"""shard_builder: packs an archive of medical images into WebDataset tar shards; needs numpy and Pillow, and pydicom for
DICOM files."""

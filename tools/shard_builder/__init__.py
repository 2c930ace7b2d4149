"""Packs an archive of medical images into WebDataset tar shards. Needs numpy and Pillow, and pydicom for DICOM files.

`build` runs all steps. `source` lists images and labels (by `scan`, `table` or `dicom`), `entries` chooses images of
each class, `pack` encodes them into spools, `duplicates` finds equal ones, `assemble` writes the shards, and `output`
replaces the output folder. `verify`, `inspect` and `sheet` read a finished set.
"""

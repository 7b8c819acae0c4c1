"""The owners' archives of UODB's eleven datasets -> COCO json in one layout; see docs/uodb.md."""

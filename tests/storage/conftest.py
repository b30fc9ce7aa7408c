from tests.support.places import bucket, place

__all__ = ["bucket", "place"]

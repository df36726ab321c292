"""Measurements that the documents cite; each prints one JSON line and keeps it in results/."""

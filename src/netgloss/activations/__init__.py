"""Activations on disk: :func:`capture` streams them into a :class:`Store`, in one pass over the images."""

from netgloss.activations.capture import CaptureOptions, capture, image_batches, prepare_store, store_key
from netgloss.activations.key import StoreInfo, StoreKey
from netgloss.activations.store import Store

__all__ = ["CaptureOptions", "Store", "StoreInfo", "StoreKey", "capture", "image_batches", "prepare_store", "store_key"]

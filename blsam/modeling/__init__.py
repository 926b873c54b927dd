"""The models. Their prompt encoder, mask decoder and small parts are `segment_anything`'s, which is looked at first."""

from ..upstream import check

check()

"""`mminfer eval`: Video QA and captioning through lmms-eval, one config beside another, with honest statistics."""

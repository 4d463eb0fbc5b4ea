"""Resources on disk, each on its own loop thread. Nothing is imported here: aiofiles is for those who `open` only."""

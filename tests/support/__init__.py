"""Code that several tests share: made runs and data, launches, failing disks."""

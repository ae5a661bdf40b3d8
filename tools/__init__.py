"""Programs other than the three scripts: convert, check, reproduce, pictures, report page, share, doctor, replay."""

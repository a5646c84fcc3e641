"""What any training needs: loop, optimizer, checkpoint record, processes, devices, logs, health watch."""

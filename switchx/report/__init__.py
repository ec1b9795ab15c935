"""Reports: run and sweep directories as pages and tables that name where each number is from."""

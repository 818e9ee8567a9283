"""Where text comes from (files, folders, data sets, built-in sources), as documents and rows."""

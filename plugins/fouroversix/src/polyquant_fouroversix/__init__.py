"""Four Over Six for polyquant: NVFP4 with adaptive block scaling, MXFP4, IF4 and NVINT4, packed on any device."""

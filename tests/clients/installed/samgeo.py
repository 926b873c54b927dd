"""samgeo: everything in a GeoTIFF, to polygons; then an object by a point, by a box, and several by boxes."""

import numpy as np

PACKAGE = "segment-geospatial"
FEW = {"points_per_side": 8, "pred_iou_thresh": 0.6, "stability_score_thresh": 0.7}


def run(photo, checkpoint, folder):
    import geopandas
    import rasterio
    from rasterio.warp import transform
    from samgeo import SamGeo

    path, (height, width) = str(folder / "photo.tif"), photo.shape[:2]
    place = rasterio.transform.from_origin(-13590000, 4530000, 10, 10)
    shape = {"height": height, "width": width, "count": 3, "dtype": "uint8"}
    with rasterio.open(path, "w", driver="GTiff", crs="EPSG:3857", transform=place, **shape) as file:
        file.write(photo.transpose(2, 0, 1))

    geo = SamGeo(model_type="vit_h", checkpoint=checkpoint, automatic=True, device="cpu", sam_kwargs=FEW)
    geo.generate(path, output=str(folder / "objects.tif"), foreground=True, unique=True)
    geo.tiff_to_vector(str(folder / "objects.tif"), str(folder / "objects.gpkg"))
    areas = geopandas.read_file(folder / "objects.gpkg").area

    asked = SamGeo(model_type="vit_b", checkpoint=checkpoint, automatic=False, device="cpu")
    asked.set_image(path)
    point = asked.predict(point_coords=[[220, 110]], point_labels=1, return_results=True)
    corners = [(220, 110), (120, 280), (300, 20), (390, 280), (465, 20)]
    there = transform("EPSG:3857", "EPSG:4326", *zip(*(place * corner for corner in corners)))
    there = [list(one) for one in zip(*there)]  # longitude, latitude
    same = asked.predict(point_coords=there[:1], point_labels=1, point_crs="EPSG:4326", return_results=True)
    boxes = [there[1] + there[2], there[3] + there[4]]
    several = asked.predict(boxes=boxes, point_crs="EPSG:4326", return_results=True)
    return {
        "objects": geo.objects,
        "areas": np.sort(areas.to_numpy()),
        "point": point[0],
        "point by its place": same[0],
        "scores": several[1].numpy(),
        "masks": several[0][:, 1].numpy() > 0,
    }

/** The shapes that a model takes: width and height in pixels, by the limits of its card. */

const SAME_RATIO = 0.012; // of the logarithm: what looks like 3:2 is called so

export class Shapes {
  /** limits: of a model card; several cards' meet in the shapes that all of them take. */
  constructor(...limits) {
    const most = (name) => Math.max(...limits.map((limit) => limit[name]));
    const least = (name) => Math.min(...limits.map((limit) => limit[name]));
    this.multiple = limits.map((limit) => limit.side_multiple).reduce(commonMultiple);
    this.minSide = Math.ceil(most("min_side") / this.multiple) * this.multiple;
    this.maxSide = Math.floor(least("max_side") / this.multiple) * this.multiple;
    this.minPixels = most("min_pixels");
    this.maxPixels = least("max_pixels");
  }

  /** What is wrong with a shape: {field, message}; null if it is legal. */
  problem(width, height) {
    for (const [field, side] of Object.entries({ width, height })) {
      if (!Number.isInteger(side) || side % this.multiple || side < this.minSide || side > this.maxSide) {
        const message = `A multiple of ${this.multiple} from ${this.minSide} to ${this.maxSide}, please.`;
        return { field, message };
      }
    }
    const pixels = width * height;
    if (pixels >= this.minPixels && pixels <= this.maxPixels) return null;
    const wrong = pixels < this.minPixels ? "small" : "large";
    const [from, to, is] = [this.minPixels, this.maxPixels, pixels].map((count) => count.toLocaleString("en"));
    const message = `${width} × ${height} is too ${wrong}: ${is} pixels, and the model takes ${from} to ${to}.`;
    return { field: "width", message };
  }

  /** The legal shape nearest to one, as the eye measures it: by the logarithm of each side. */
  nearest(width, height) {
    let best = null;
    for (let w = this.minSide; w <= this.maxSide; w += this.multiple) {
      const h = this.#nearestHeight(w, height);
      if (h === null) continue;
      const distance = Math.log(w / width) ** 2 + Math.log(h / height) ** 2;
      if (best === null || distance < best.distance) best = { width: w, height: h, distance };
    }
    return best && { width: best.width, height: best.height };
  }

  /** The legal shape of that ratio whose area is nearest; where there is none, the nearest of about that ratio. */
  ofRatio(ratio, pixels) {
    let best = null;
    for (const { width, height } of this.all(4)) {
      const bent = Math.abs(Math.log(width / height / ratio));
      if (bent >= SAME_RATIO) continue;
      const distance = Math.abs(Math.log((width * height) / pixels)) + 4 * bent;
      if (best === null || distance < best.distance) best = { width, height, distance };
    }
    if (best) return { width: best.width, height: best.height };
    return this.nearest(Math.sqrt(pixels * ratio), Math.sqrt(pixels / ratio));
  }

  /** Every legal shape with a ratio up to `ratio`:1 either way. */
  *all(ratio) {
    for (let width = this.minSide; width <= this.maxSide; width += this.multiple) {
      const [low, high] = this.#heights(width);
      for (let height = low; height <= high; height += this.multiple) {
        if (width <= ratio * height && height <= ratio * width) yield { width, height };
      }
    }
  }

  #heights(width) {
    const up = Math.ceil(this.minPixels / width / this.multiple) * this.multiple;
    const down = Math.floor(this.maxPixels / width / this.multiple) * this.multiple;
    return [Math.max(this.minSide, up), Math.min(this.maxSide, down)];
  }

  #nearestHeight(width, height) {
    const [low, high] = this.#heights(width);
    if (low > high) return null;
    const below = Math.floor(height / this.multiple) * this.multiple;
    const above = below + this.multiple;
    const nearest = height * height < below * above ? below : above;
    return Math.min(high, Math.max(low, nearest));
  }
}

/** A ratio as people say it: 1:1, 16:9, or 1.37:1. */
export function ratioName(width, height) {
  const ratio = width / height;
  const near = RATIOS.find((known) => Math.abs(Math.log(ratio / (known[0] / known[1]))) < SAME_RATIO);
  if (near) return `${near[0]}:${near[1]}`;
  return ratio > 1 ? `${ratio.toFixed(2)}:1` : `1:${(1 / ratio).toFixed(2)}`;
}

/** Ratios that have a name. */
export const RATIOS = [
  [9, 21],
  [9, 16],
  [2, 3],
  [3, 4],
  [4, 5],
  [1, 1],
  [5, 4],
  [4, 3],
  [3, 2],
  [16, 9],
  [21, 9],
];

/** Megapixels (of 1,048,576) as a short text. */
export function megapixels(width, height) {
  return `${((width * height) / 2 ** 20).toFixed(2)} MP`;
}

function commonMultiple(a, b) {
  const divisor = (x, y) => (y ? divisor(y, x % y) : x);
  return (a * b) / divisor(a, b);
}

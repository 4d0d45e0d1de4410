// Convolutions of 3x3 taps over every place of pictures by Winograd's F(4x4, 3x3) and F(2x2, 3x3): a tile of 4x4 places is
// made of the 6x6 that it sees with 36 multiplications instead of 144, one of 2x2 of 4x4 with 16 instead of 36. The
// gradient of what went in is the same with the weights turned round, that of the weights the transpose of it. Tiles are
// shared by the threads, and for the weights' gradient rows of products; every number is the same sum in the same order
// for any number of them. Source: Lavin and Gray, https://arxiv.org/abs/1509.09308
#include "native.h"
#define LARGEST 6 // places that a tile sees each way
#define SKEW WIDE // numbers after each row: rows of a power of two would share few lines of a cache

// Where polynomials are evaluated beside 0 and infinity: +-NEAR and +-FAR, whose errors in float32 are half of those of the
// usual 1 and 2, and 1 for the small tile.
#define NEAR 0.625f
#define FAR 1.5f
#define NEAR2 (NEAR * NEAR)
#define FAR2 (FAR * FAR)

typedef struct {
    int64_t batch, in, out, height, width;       // channels that go in and come out, multiples of WIDE
    int64_t tile, some;                          // 4 or 2 places a side; tiles that are transformed before they are multiplied
    const float *x, *gradient;                   // (B, h, w, C), (B, h, w, C')
    int64_t x_batch, x_line, x_place, gradient_batch, gradient_line, gradient_place; // strides
    const float *weight, *bias;                  // (C', C, 3, 3)
    int64_t weight_out, weight_in, weight_line, weight_tap;
    float *found;                                // what comes out, (B, h, w, C'), or the weight's gradient
    int64_t found_batch, found_line, found_place, found_out, found_in, found_row, found_tap;
    float *panels, *scratch;                     // the weights as they were laid before, or NULL; winograd_scratch() numbers
} winograd;

int64_t winograd_size(void) { return sizeof(winograd); }

static int64_t side_of(const winograd *one) { return one->tile + 2; }
static int64_t tiles_of(const winograd *one) {
    return one->batch * blocks_of(one->height, one->tile) * blocks_of(one->width, one->tile);
}

// Numbers that a thread needs for a row of the weights' gradient: of what tiles see, and of what came back.
static int64_t row_numbers(const winograd *one) {
    return side_of(one) * one->some * (blocks_of(one->in, PANEL) * PANEL + one->out + SKEW);
}

static int64_t points_of(const winograd *one) { return side_of(one) * side_of(one); }
static int64_t tile_numbers(const winograd *one) { return points_of(one) * one->some * (one->in + one->out + 2 * SKEW); }

// Numbers that the weights take as they are laid.
int64_t winograd_panels(const winograd *one) { return points_of(one) * blocks_of(one->out, PANEL) * PANEL * one->in; }

int64_t winograd_scratch(const winograd *one, int64_t is_gradient, int64_t threads) {
    int64_t columns = blocks_of(one->in, PANEL) * PANEL;
    if (is_gradient) return threads * row_numbers(one) + points_of(one) * blocks_of(one->out, TALL) * TALL * columns;
    return threads * tile_numbers(one) + (one->panels ? 0 : winograd_panels(one));
}

typedef struct { int64_t batch, y, x; } corner;
static inline corner corner_of(const winograd *one, int64_t number) {
    int64_t across = blocks_of(one->width, one->tile), each = across * blocks_of(one->height, one->tile);
    return (corner){number / each, number % each / across * one->tile, number % across * one->tile};
}

// --- along a line: B^T d, A^T m, A y, G g and G^T u ------------------------------------------------------------------

INLINE void see(int tile, vector *d, int step) {
    vector a = d[0], b = d[step], c = d[2 * step], e = d[3 * step];
    if (tile == 2) {
        d[0] = a - c, d[step] = b + c, d[2 * step] = c - b, d[3 * step] = b - e;
        return;
    }
    vector f = d[4 * step], last = d[5 * step];
    vector near = f - c * FAR2, by_near = (e - b * FAR2) * NEAR, far = f - c * NEAR2, by_far = (e - b * NEAR2) * FAR;
    d[0] = a * (NEAR2 * FAR2) - c * (NEAR2 + FAR2) + f;
    d[step] = near + by_near, d[2 * step] = near - by_near, d[3 * step] = far + by_far, d[4 * step] = far - by_far;
    d[5 * step] = b * (NEAR2 * FAR2) - e * (NEAR2 + FAR2) + last;
}

INLINE void make(int tile, const vector *m, vector *y) {
    vector sum = m[1] + m[2], apart = m[1] - m[2];
    if (tile == 2) {
        y[0] = m[0] + sum, y[1] = apart - m[3];
        return;
    }
    vector far_sum = m[3] + m[4], far_apart = m[3] - m[4];
    y[0] = m[0] + sum + far_sum, y[1] = apart * NEAR + far_apart * FAR;
    y[2] = sum * NEAR2 + far_sum * FAR2, y[3] = apart * (NEAR * NEAR2) + far_apart * (FAR * FAR2) + m[5];
}

INLINE void back(int tile, const vector *y, vector *z) {
    if (tile == 2) {
        z[0] = y[0], z[1] = y[0] + y[1], z[2] = y[0] - y[1], z[3] = (vector){0} - y[1];
        return;
    }
    vector even = y[0] + y[2] * NEAR2, odd = y[1] * NEAR + y[3] * (NEAR * NEAR2);
    vector far_even = y[0] + y[2] * FAR2, far_odd = y[1] * FAR + y[3] * (FAR * FAR2);
    z[0] = y[0], z[1] = even + odd, z[2] = even - odd, z[3] = far_even + far_odd, z[4] = far_even - far_odd, z[5] = y[3];
}

// How a weight is scaled at the points.
#define AT_ZERO (1 / (NEAR2 * FAR2))
#define AT_NEAR (1 / (2 * NEAR2 * (NEAR2 - FAR2)))
#define AT_FAR (1 / (2 * FAR2 * (FAR2 - NEAR2)))

INLINE void spread(int tile, const vector *g, vector *u) {
    if (tile == 2) {
        vector even = (g[0] + g[2]) * 0.5f, odd = g[1] * 0.5f;
        u[0] = g[0], u[1] = even + odd, u[2] = even - odd, u[3] = g[2];
        return;
    }
    vector even = g[0] * AT_NEAR + g[2] * (NEAR2 * AT_NEAR), odd = g[1] * (NEAR * AT_NEAR);
    vector far_even = g[0] * AT_FAR + g[2] * (FAR2 * AT_FAR), far_odd = g[1] * (FAR * AT_FAR);
    u[0] = g[0] * AT_ZERO, u[1] = even + odd, u[2] = even - odd, u[3] = far_even + far_odd, u[4] = far_even - far_odd;
    u[5] = g[2];
}

INLINE void gather(int tile, const vector *u, vector *g) {
    vector sum = u[1] + u[2], apart = u[1] - u[2];
    if (tile == 2) {
        g[0] = u[0] + sum * 0.5f, g[1] = apart * 0.5f, g[2] = sum * 0.5f + u[3];
        return;
    }
    vector far_sum = u[3] + u[4], far_apart = u[3] - u[4];
    g[0] = u[0] * AT_ZERO + sum * AT_NEAR + far_sum * AT_FAR;
    g[1] = apart * (NEAR * AT_NEAR) + far_apart * (FAR * AT_FAR);
    g[2] = sum * (NEAR2 * AT_NEAR) + far_sum * (FAR2 * AT_FAR) + u[5];
}

// The rows of B^T and of A, for one row of products alone.
static const float SEEN[2][LARGEST][LARGEST] = {
    {{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, 1, 0, -1}},
    {{NEAR2 * FAR2, 0, -NEAR2 - FAR2, 0, 1, 0},
     {0, -NEAR * FAR2, -FAR2, NEAR, 1, 0}, {0, NEAR * FAR2, -FAR2, -NEAR, 1, 0},
     {0, -FAR * NEAR2, -NEAR2, FAR, 1, 0}, {0, FAR * NEAR2, -NEAR2, -FAR, 1, 0},
     {0, NEAR2 * FAR2, 0, -NEAR2 - FAR2, 0, 1}}};
static const float BACK[2][LARGEST][4] = {
    {{1, 0}, {1, 1}, {1, -1}, {0, -1}},
    {{1, 0, 0, 0}, {1, NEAR, NEAR2, NEAR * NEAR2}, {1, -NEAR, NEAR2, -NEAR * NEAR2},
     {1, FAR, FAR2, FAR * FAR2}, {1, -FAR, FAR2, -FAR * FAR2}, {0, 0, 0, 1}}};

// --- forwards ---------------------------------------------------------------------------------------------------------

// Read what a tile sees of WIDE channels, zeros around the picture: lines `apart` in d.
INLINE void read(int side, const winograd *one, corner at, int line, const float *x, vector *d) {
    int64_t y = at.y + line - 1;
    const float *from = x + at.batch * one->x_batch + y * one->x_line + (at.x - 1) * one->x_place;
    for (int place = 0; place < side; place++) {
        int64_t column = at.x + place - 1;
        int is_in = y >= 0 && y < one->height && column >= 0 && column < one->width;
        d[place] = is_in ? *(const vector *)(from + place * one->x_place) : (vector){0};
    }
}

// Transform what a tile sees of WIDE channels; its points come to lie `apart`.
INLINE void transform(int tile, const winograd *one, corner at, const float *x, float *to, int64_t apart) {
    int side = tile + 2;
    vector d[LARGEST * LARGEST];
    for (int line = 0; line < side; line++) {
        read(side, one, at, line, x, d + line * side);
        see(tile, d + line * side, 1);
    }
    for (int place = 0; place < side; place++) {
        see(tile, d + place, side);
        for (int line = 0; line < side; line++) *(vector *)(to + (line * side + place) * apart) = d[line * side + place];
    }
}

// Transform the sums of WIDE channels back to the places of a tile, with the bias.
INLINE void put(int tile, const winograd *one, corner at, const float *sums, int64_t apart, vector bias, int64_t channel) {
    int side = tile + 2;
    vector half[LARGEST * 4];
    for (int line = 0; line < side; line++) {
        vector m[LARGEST];
        for (int place = 0; place < side; place++) m[place] = *(const vector *)(sums + (line * side + place) * apart);
        make(tile, m, half + line * tile);
    }
    for (int place = 0; place < tile && at.x + place < one->width; place++) {
        vector m[LARGEST], y[4];
        for (int line = 0; line < side; line++) m[line] = half[line * tile + place];
        make(tile, m, y);
        float *to = one->found + at.batch * one->found_batch + at.y * one->found_line + (at.x + place) * one->found_place;
        for (int line = 0; line < tile && at.y + line < one->height; line++)
            *(vector *)(to + line * one->found_line + channel) = y[line] + bias;
    }
}

// Lay the weights, transformed, in panels of channels that come out: (points, C' / PANEL, C, PANEL).
INLINE void lay_as(int tile, const winograd *one, float *panels, int64_t part, int64_t parts) {
    int side = tile + 2;
    int64_t all = blocks_of(one->out, PANEL), apart = all * PANEL * one->in, tasks = all * one->in / WIDE;
    for (int64_t task = tasks * part / parts; task < tasks * (part + 1) / parts; task++) {
        int64_t number = task / (one->in / WIDE), start = task % (one->in / WIDE) * WIDE, first = number * PANEL;
        int64_t count = one->out - first < PANEL ? one->out - first : PANEL;
        float g[9][WIDE][PANEL];
        if (count < PANEL) memset(g, 0, sizeof(g));
        for (int tap = 0; tap < 9; tap++) {
            const float *from = one->weight + first * one->weight_out + start * one->weight_in
                + tap / 3 * one->weight_line + tap % 3 * one->weight_tap;
            for (int64_t c = 0; c < count; c++)
                for (int i = 0; i < WIDE; i++) g[tap][i][c] = from[c * one->weight_out + i * one->weight_in];
        }
        float *to = panels + (number * one->in + start) * PANEL;
        for (int i = 0; i < WIDE; i++, to += PANEL)
            for (int half = 0; half < PANEL; half += WIDE) {
                vector across[3][LARGEST];
                for (int line = 0; line < 3; line++) {
                    vector taps[3];
                    for (int tap = 0; tap < 3; tap++) taps[tap] = *(const vector *)&g[3 * line + tap][i][half];
                    spread(tile, taps, across[line]);
                }
                for (int place = 0; place < side; place++) {
                    vector lines[3] = {across[0][place], across[1][place], across[2][place]}, u[LARGEST];
                    spread(tile, lines, u);
                    for (int line = 0; line < side; line++) *(vector *)(to + (line * side + place) * apart + half) = u[line];
                }
            }
    }
}

static void lay(const winograd *one, float *panels, int64_t part, int64_t parts) {
    if (one->tile == 4) lay_as(4, one, panels, part, parts);
    else lay_as(2, one, panels, part, parts);
}

void lay_winograd(const winograd *one, int64_t threads) {
    IN_PARALLEL {
        PART
        lay(one, one->panels, part, parts);
    }
}

INLINE void convolve_some(int tile, const winograd *one, int64_t first, int64_t count, const float *panels, float *seen) {
    int64_t all = blocks_of(one->out, PANEL), in = one->in + SKEW, out = one->out + SKEW, points = (tile + 2) * (tile + 2);
    float *sums = seen + points * one->some * in;
    for (int64_t i = 0; i < count; i++) {
        corner at = corner_of(one, first + i);
        for (int64_t channel = 0; channel < one->in; channel += WIDE)
            transform(tile, one, at, one->x + channel, seen + i * in + channel, one->some * in);
    }
    for (int64_t point = 0; point < points; point++)
        for (int64_t begin = 0; begin < count; begin += MANY) {
            int64_t rows = count - begin < MANY ? count - begin : MANY;
            const float *from[MANY];
            float *to[MANY];
            for (int64_t i = 0; i < rows; i++) {
                from[i] = seen + (point * one->some + begin + i) * in;
                to[i] = sums + (point * one->some + begin + i) * out;
            }
            multiply_rows(from, to, rows, panels + point * all * PANEL * one->in, 0, one->in, one->in, one->out, 0, all, NULL, 0);
        }
    for (int64_t i = 0; i < count; i++) {
        corner at = corner_of(one, first + i);
        for (int64_t channel = 0; channel < one->out; channel += WIDE) {
            vector bias = one->bias ? *(const vector *)(one->bias + channel) : (vector){0};
            put(tile, one, at, sums + i * out + channel, one->some * out, bias, channel);
        }
    }
}

void convolve_winograd(const winograd *one, int64_t threads) {
    int64_t tiles = tiles_of(one), blocks = blocks_of(tiles, one->some);
    IN_PARALLEL {
        PART
        float *own = one->scratch + part * tile_numbers(one);
        float *panels = one->panels;
        if (!panels) {
            panels = one->scratch + parts * tile_numbers(one);
            lay(one, panels, part, parts);
            WAIT
        }
        for (int64_t number = blocks * part / parts; number < blocks * (part + 1) / parts; number++) {
            int64_t first = number * one->some, count = tiles - first < one->some ? tiles - first : one->some;
            if (one->tile == 4) convolve_some(4, one, first, count, panels, own);
            else convolve_some(2, one, first, count, panels, own);
        }
    }
}

// --- the gradient of the weights --------------------------------------------------------------------------------------

// One row of what a tile sees, transformed.
INLINE void transform_row(int tile, const winograd *one, corner at, int row, const float *x, float *to, int64_t apart) {
    int side = tile + 2;
    vector sum[LARGEST] = {0}, d[LARGEST];
    for (int line = 0; line < side; line++) {
        float factor = SEEN[tile == 4][row][line];
        if (factor == 0) continue;
        read(side, one, at, line, x, d);
        for (int place = 0; place < side; place++) sum[place] += d[place] * factor;
    }
    see(tile, sum, 1);
    for (int place = 0; place < side; place++) *(vector *)(to + place * apart) = sum[place];
}

// One row of what came back of a tile, transformed.
INLINE void return_row(int tile, const winograd *one, corner at, int row, const float *gradient, float *to, int64_t apart) {
    const float *from = gradient + at.batch * one->gradient_batch + at.y * one->gradient_line + at.x * one->gradient_place;
    vector sum[4] = {0}, z[LARGEST];
    for (int line = 0; line < tile && at.y + line < one->height; line++, from += one->gradient_line) {
        float factor = BACK[tile == 4][row][line];
        if (factor == 0) continue;
        for (int place = 0; place < tile && at.x + place < one->width; place++)
            sum[place] += *(const vector *)(from + place * one->gradient_place) * factor;
    }
    back(tile, sum, z);
    for (int place = 0; place < tile + 2; place++) *(vector *)(to + place * apart) = z[place];
}

// Add up the products of one row of points over all tiles, for blocks of channels that come out from `first` to `last`.
INLINE void add_row(int tile, const winograd *one, int row, int64_t first, int64_t last, float *seen, float *sums) {
    int64_t tiles = tiles_of(one), ins = blocks_of(one->in, PANEL), outs = blocks_of(one->out, TALL), wide = one->out + SKEW;
    int64_t from = first * TALL / WIDE * WIDE, to = last * TALL < one->out ? last * TALL : one->out, side = tile + 2;
    float *came = seen + side * one->some * ins * PANEL;
    // what is multiplied and counts for nothing: whatever lies there must not be so small that it takes long
    for (int64_t point = 0; point < side && one->in % PANEL; point++)
        memset(seen + ((point + 1) * ins - 1) * one->some * PANEL, 0, sizeof(float) * one->some * PANEL);
    for (int64_t i = 0; i < side * one->some; i++) memset(came + i * wide + one->out, 0, sizeof(float) * SKEW);
    for (int64_t start = 0; start < tiles; start += one->some) {
        int64_t count = tiles - start < one->some ? tiles - start : one->some;
        for (int64_t i = 0; i < count; i++) {
            corner at = corner_of(one, start + i);
            for (int64_t channel = 0; channel < one->in; channel += WIDE)
                transform_row(tile, one, at, row, one->x + channel,
                              seen + (channel / PANEL * one->some + i) * PANEL + channel % PANEL, one->some * ins * PANEL);
            for (int64_t channel = from; channel < to; channel += WIDE)
                return_row(tile, one, at, row, one->gradient + channel, came + i * wide + channel, one->some * wide);
        }
        for (int64_t point = 0; point < side; point++)
            for (int64_t group = first; group < last; group++)
                for (int64_t number = 0; number < ins; number++)
                    add_products(came + point * one->some * wide + group * TALL, wide,
                                 seen + (point * ins + number) * one->some * PANEL, count,
                                 (vector *)(sums + (((row * side + point) * outs + group) * ins + number) * TALL * PANEL));
    }
}

// Transform the sums of TALL and PANEL channels to the gradient of a weight.
INLINE void put_gradient(int tile, const winograd *one, const float *sums, int64_t apart, int64_t first_out, int64_t first_in) {
    int side = tile + 2;
    for (int64_t out = 0; out < TALL && first_out + out < one->out; out++)
        for (int64_t half = 0; half < PANEL && first_in + half < one->in; half += WIDE) {
            vector across[LARGEST][3];
            const float *from = sums + out * PANEL + half;
            for (int line = 0; line < side; line++) {
                vector u[LARGEST];
                for (int place = 0; place < side; place++) u[place] = *(const vector *)(from + (line * side + place) * apart);
                gather(tile, u, across[line]);
            }
            for (int tap = 0; tap < 3; tap++) {
                vector u[LARGEST], g[3];
                for (int line = 0; line < side; line++) u[line] = across[line][tap];
                gather(tile, u, g);
                for (int line = 0; line < 3; line++) {
                    float *to = one->found + (first_out + out) * one->found_out + (first_in + half) * one->found_in
                        + line * one->found_row + tap * one->found_tap;
                    for (int i = 0; i < WIDE; i++) to[i * one->found_in] = g[line][i];
                }
            }
        }
}

void weigh_winograd(const winograd *one, int64_t threads) {
    int64_t ins = blocks_of(one->in, PANEL), outs = blocks_of(one->out, TALL), apart = outs * ins * TALL * PANEL;
    int64_t side = side_of(one), numbers = side * side * apart;
    float *sums = one->scratch + threads * row_numbers(one);
    IN_PARALLEL {
        PART
        int64_t slices = 1;
        while (side * slices % parts) slices++; // so that all have as much to do
        int64_t tasks = side * slices, begin = numbers * part / parts, end = numbers * (part + 1) / parts;
        memset(sums + begin, 0, sizeof(float) * (end - begin));
        WAIT
        for (int64_t task = tasks * part / parts; task < tasks * (part + 1) / parts; task++) {
            int64_t row = task / slices, slice = task % slices, from = outs * slice / slices, to = outs * (slice + 1) / slices;
            float *own = one->scratch + part * row_numbers(one);
            if (one->tile == 4) add_row(4, one, (int)row, from, to, own, sums);
            else add_row(2, one, (int)row, from, to, own, sums);
        }
        WAIT
        for (int64_t task = outs * ins * part / parts; task < outs * ins * (part + 1) / parts; task++) {
            const float *own = sums + task * TALL * PANEL;
            if (one->tile == 4) put_gradient(4, one, own, apart, task / ins * TALL, task % ins * PANEL);
            else put_gradient(2, one, own, apart, task / ins * TALL, task % ins * PANEL);
        }
    }
}

// What lies between two convolutions of a network that learns: a norm, an activation, FiLM or what is added, and
// their gradients. Channels lie in order; places (moments, pixels) are rows of them. Each sample is the work of one
// thread, so numbers are the same for any number of threads.
#include "native.h"
#define SOME 16 // places whose sums are added up before they meet the others', which keeps them exact

int64_t between_size(void) { return sizeof(between); }
int64_t scratch_size(int64_t threads, int64_t batch, int64_t channels) {
    return (threads * OWN_ROWS + batch * 3) * channels;
}

// The rows of a sample, behind those of all threads.
static float *of_sample(const between *one, int64_t batch, int64_t number) {
    return one->samples + (number * one->batch + batch) * one->channels;
}

// Add up each channel of a sample, or its squares around the mean, in parts of SOME places.
static void add_up(const between *one, const float *x, const float *restrict mean, float *restrict sums,
                   float *restrict some) {
    int64_t channels = one->channels;
    memset(sums, 0, sizeof(float) * channels);
    for (int64_t first = 0; first < one->places; first += SOME) {
        int64_t last = first + SOME < one->places ? first + SOME : one->places;
        memset(some, 0, sizeof(float) * channels);
        for (int64_t p = first; p < last; p++) {
            const float *restrict row = x + p * one->x_place;
            if (mean) for (int64_t c = 0; c < channels; c++) some[c] += (row[c] - mean[c]) * (row[c] - mean[c]);
            else for (int64_t c = 0; c < channels; c++) some[c] += row[c];
        }
        for (int64_t c = 0; c < channels; c++) sums[c] += some[c];
    }
}

// Write the mean and 1 / deviation of each group; what is added at the start comes to it here.
static void find_moments(const between *one, const float *x, float *moments, float *sums, float *some, float *mean) {
    int64_t size = one->channels / one->groups;
    float count = (float)(one->places * size);
    add_up(one, x, NULL, sums, some);
    for (int64_t g = 0; g < one->groups; g++) {
        float sum = 0;
        for (int64_t c = g * size; c < (g + 1) * size; c++)
            sum += sums[c] + (one->start ? one->start[c] * (float)one->places : 0);
        moments[2 * g] = sum / count;
        for (int64_t c = g * size; c < (g + 1) * size; c++) mean[c] = sum / count - (one->start ? one->start[c] : 0);
    }
    add_up(one, x, mean, sums, some);
    for (int64_t g = 0; g < one->groups; g++) {
        float sum = 0;
        for (int64_t c = g * size; c < (g + 1) * size; c++) sum += sums[c];
        moments[2 * g + 1] = 1 / sqrtf(sum / count + one->eps);
    }
}

// Write for each channel the mean of its group, without what is added at the start, and 1 / deviation.
static void spread(const between *one, const float *moments, float *restrict mean, float *restrict rate) {
    int64_t size = one->channels / one->groups;
    for (int64_t c = 0; c < one->channels; c++) {
        mean[c] = moments[c / size * 2] - (one->start ? one->start[c] : 0);
        rate[c] = moments[c / size * 2 + 1];
    }
}

// Make what comes out of a sample, each channel normalised by its mean and by `gain`, 1 / deviation times the weight.
static void come_out(const between *one, int64_t batch, const float *restrict mean, const float *restrict gain) {
    int64_t channels = one->channels;
    const float *restrict bias = one->bias;
    const float *restrict scale = one->scale ? one->scale + batch * one->film_batch : NULL;
    const float *restrict shift = one->shift ? one->shift + batch * one->film_batch : NULL;
    for (int64_t p = 0; p < one->places; p++) {
        const float *restrict row = one->x + batch * one->x_batch + p * one->x_place;
        const float *restrict added = one->added ? one->added + batch * one->added_batch + p * one->added_place : NULL;
        float *restrict out = one->out + batch * one->out_batch + p * one->out_place;
        if (one->activation == MISH) {
            for (int64_t c = 0; c < channels; c++) out[c] = mish((row[c] - mean[c]) * gain[c] + bias[c]);
            if (scale) for (int64_t c = 0; c < channels; c++) out[c] *= scale[c];
            if (shift) for (int64_t c = 0; c < channels; c++) out[c] += shift[c];
            if (added) for (int64_t c = 0; c < channels; c++) out[c] += added[c];
            continue;
        }
        if (added) for (int64_t c = 0; c < channels; c++) out[c] = (row[c] - mean[c]) * gain[c] + bias[c] + added[c];
        else for (int64_t c = 0; c < channels; c++) out[c] = (row[c] - mean[c]) * gain[c] + bias[c];
        if (one->activation == RELU) for (int64_t c = 0; c < channels; c++) out[c] = out[c] < 0 ? 0 : out[c]; // NaN stays
    }
}

// Write the gradient of what was normalised, and add to what FiLM's scales and shifts have as theirs.
static inline __attribute__((always_inline)) void
through_mish(const between *one, const float *restrict row, const float *restrict gradient, const float *restrict mean,
             const float *restrict gain, const float *restrict scale, float *restrict by_scale,
             float *restrict by_shift, float *restrict found) {
    const float *restrict bias = one->bias;
    for (int64_t c = 0; c < one->channels; c++) {
        float z = (row[c] - mean[c]) * gain[c] + bias[c], e = exponential(-fabsf(z));
        float up = z < 0 ? e * (e + 2) : 1 + 2 * e, down = z < 0 ? up + 2 : up + 2 * e * e, inverse = 1 / down;
        float gate = up * inverse, slope = gate + 4 * z * inverse * inverse * (z < 0 ? e : e * e) * (1 + e);
        float came = gradient[c];
        if (by_scale) by_scale[c] += came * z * gate;
        if (by_shift) by_shift[c] += came;
        found[c] = (scale ? came * scale[c] : came) * slope;
    }
}

// Write the gradient of what was rectified, with nothing added before: which was positive is found out again.
static void rectify(const between *one, const float *restrict row, const float *restrict gradient,
                    const float *restrict mean, const float *restrict gain, float *restrict found) {
    const float *restrict bias = one->bias;
    for (int64_t c = 0; c < one->channels; c++)
        found[c] = (row[c] - mean[c]) * gain[c] + bias[c] <= 0 ? 0 : gradient[c];
}

// Write the gradient of what was normalised in a sample to `kept`, if it is kept, and sum up those of weight and bias.
static void go_back(const between *one, int64_t batch, const float *restrict mean, const float *restrict rate,
                    float *scratch, float *kept, int64_t kept_place) {
    int64_t channels = one->channels;
    float *restrict some_bias = scratch, *restrict some_weight = scratch + channels, *restrict gain = some_weight + channels;
    float *restrict by_weight = of_sample(one, batch, 1), *restrict by_bias = of_sample(one, batch, 2);
    const float *scale = one->scale ? one->scale + batch * one->film_batch : NULL;
    float *by_scale = one->by_scale ? one->by_scale + batch * one->by_film_batch : NULL;
    float *by_shift = one->by_shift ? one->by_shift + batch * one->by_film_batch : NULL;
    for (int64_t c = 0; c < channels; c++) gain[c] = rate[c] * one->weight[c];
    memset(by_weight, 0, sizeof(float) * channels);
    memset(by_bias, 0, sizeof(float) * channels);
    if (by_scale) memset(by_scale, 0, sizeof(float) * channels);
    if (by_shift) memset(by_shift, 0, sizeof(float) * channels);
    for (int64_t first = 0; first < one->places; first += SOME) {
        int64_t last = first + SOME < one->places ? first + SOME : one->places;
        memset(some_bias, 0, sizeof(float) * 2 * channels);
        for (int64_t p = first; p < last; p++) {
            const float *restrict row = one->x + batch * one->x_batch + p * one->x_place;
            const float *restrict gradient = one->gradient + batch * one->gradient_batch + p * one->gradient_place;
            float *restrict found = kept ? kept + p * kept_place : gain + channels;
            if (one->activation == MISH) {
                if (by_scale) through_mish(one, row, gradient, mean, gain, scale, by_scale, by_shift, found);
                else if (by_shift) through_mish(one, row, gradient, mean, gain, NULL, NULL, by_shift, found);
                else through_mish(one, row, gradient, mean, gain, NULL, NULL, NULL, found);
            } else if (one->activation == RELU && !one->out) {
                rectify(one, row, gradient, mean, gain, found);
            } else if (one->activation == RELU) {
                const float *restrict out = one->out + batch * one->out_batch + p * one->out_place;
                for (int64_t c = 0; c < channels; c++) found[c] = out[c] <= 0 ? 0 : gradient[c];
            } else {
                memcpy(found, gradient, sizeof(float) * channels);
            }
            for (int64_t c = 0; c < channels; c++) {
                some_bias[c] += found[c];
                some_weight[c] += found[c] * ((row[c] - mean[c]) * rate[c]);
            }
        }
        for (int64_t c = 0; c < channels; c++) {
            by_bias[c] += some_bias[c];
            by_weight[c] += some_weight[c];
        }
    }
}

// Write the gradient of x: of `kept` times the gain, without its mean and without its slope along x.
static void arrive(const between *one, int64_t batch, const float *restrict mean, const float *restrict gain,
                   const float *restrict level, const float *restrict slant, float *restrict some, const float *kept,
                   int64_t kept_place) {
    int64_t channels = one->channels;
    float *restrict by_start = of_sample(one, batch, 0);
    memset(by_start, 0, sizeof(float) * channels);
    for (int64_t p = 0; p < one->places; p++) {
        const float *restrict row = one->x + batch * one->x_batch + p * one->x_place;
        const float *found = kept ? kept + p * kept_place : some;
        if (!kept) {
            const float *gradient = one->gradient + batch * one->gradient_batch + p * one->gradient_place;
            if (one->activation == RELU) rectify(one, row, gradient, mean, gain, some);
            else found = gradient;
        }
        float *by_x = one->by_x + batch * one->by_x_batch + p * one->by_x_place; // may be where `found` is, number by number
#pragma GCC ivdep
        for (int64_t c = 0; c < channels; c++) {
            float by = found[c] * gain[c] - level[c] - (row[c] - mean[c]) * slant[c];
            by_x[c] = by;
            by_start[c] += by;
        }
    }
}

void forwards(const between *one, int64_t batch, float *scratch) {
    int64_t channels = one->channels;
    float *mean = scratch, *gain = scratch + channels, *moments = one->moments + batch * one->groups * 2;
    find_moments(one, one->x + batch * one->x_batch, moments, gain, scratch + 2 * channels, mean);
    spread(one, moments, mean, gain);
    for (int64_t c = 0; c < channels; c++) gain[c] *= one->weight[c];
    come_out(one, batch, mean, gain);
}

void backwards(const between *one, int64_t batch, float *scratch) {
    int64_t channels = one->channels, size = channels / one->groups;
    float *mean = scratch, *rate = mean + channels, *level = rate + channels, *slant = level + channels;
    // Rectified, the gradient of a sum is that of what was added, too, and is kept there.
    float *kept = one->by_added ? one->by_added + batch * one->added_batch : one->by_x + batch * one->by_x_batch;
    int64_t place = one->by_added ? one->added_place : one->by_x_place;
    float count = (float)(one->places * size);
    spread(one, one->moments + batch * one->groups * 2, mean, rate);
    go_back(one, batch, mean, rate, scratch + 2 * channels, kept, place);
    const float *by_weight = of_sample(one, batch, 1), *by_bias = of_sample(one, batch, 2);
    for (int64_t g = 0; g < one->groups; g++) {
        float sum = 0, sloped = 0;
        for (int64_t c = g * size; c < (g + 1) * size; c++) {
            sum += one->weight[c] * by_bias[c];
            sloped += one->weight[c] * by_weight[c];
        }
        for (int64_t c = g * size; c < (g + 1) * size; c++) {
            level[c] = rate[c] * sum / count;
            slant[c] = rate[c] * rate[c] * sloped / count;
        }
    }
    for (int64_t c = 0; c < channels; c++) rate[c] *= one->weight[c];
    arrive(one, batch, mean, rate, level, slant, NULL, kept, place);
}

// Of batch norm, whose moments are of all samples: each one's sums, and squares around its own mean.
static void sum_up(const between *one, int64_t batch, float *scratch) {
    int64_t channels = one->channels;
    float *sums = of_sample(one, batch, 0);
    add_up(one, one->x + batch * one->x_batch, NULL, sums, scratch);
    for (int64_t c = 0; c < channels; c++) scratch[channels + c] = sums[c] / (float)one->places;
    add_up(one, one->x + batch * one->x_batch, scratch + channels, of_sample(one, batch, 1), scratch);
}

// Put them together, for some channels. Source: Chan et al., "Updating formulae and a pairwise algorithm", 1979.
static void put_together(const between *one, int64_t from, int64_t to) {
    int64_t channels = one->channels;
    float each = (float)one->places, count = each * (float)one->batch;
    float *restrict mean = one->moments, *restrict rate = one->moments + channels;
    for (int64_t c = from; c < to; c++) mean[c] = rate[c] = 0;
    for (int64_t batch = 0; batch < one->batch; batch++) {
        const float *restrict sums = of_sample(one, batch, 0);
        for (int64_t c = from; c < to; c++) mean[c] += sums[c];
    }
    for (int64_t c = from; c < to; c++) mean[c] /= count;
    for (int64_t batch = 0; batch < one->batch; batch++) {
        const float *restrict sums = of_sample(one, batch, 0), *restrict squares = of_sample(one, batch, 1);
        for (int64_t c = from; c < to; c++) {
            float apart = sums[c] / each - mean[c];
            rate[c] += squares[c] + each * apart * apart;
        }
    }
    for (int64_t c = from; c < to; c++) {
        if (one->running_mean) {
            one->running_mean[c] += one->momentum * (mean[c] - one->running_mean[c]);
            one->running_variance[c] += one->momentum * (rate[c] / (count - 1) - one->running_variance[c]);
        }
        rate[c] = 1 / sqrtf(rate[c] / count + one->eps);
    }
}

static void come_out_alike(const between *one, int64_t batch, float *scratch) {
    for (int64_t c = 0; c < one->channels; c++) scratch[c] = one->moments[one->channels + c] * one->weight[c];
    come_out(one, batch, one->moments, scratch);
}

static void go_back_alike(const between *one, int64_t batch, float *scratch) {
    float *kept = one->by_added ? one->by_added + batch * one->added_batch : NULL;
    go_back(one, batch, one->moments, one->moments + one->channels, scratch, kept, one->added_place);
}

static void arrive_alike(const between *one, int64_t batch, float *scratch) {
    int64_t channels = one->channels;
    float count = (float)(one->places * one->batch), *level = scratch + channels, *slant = level + channels;
    const float *mean = one->moments, *rate = mean + channels, *by_weight = one->by_affine + channels;
    const float *by_bias = by_weight + channels, *kept = one->by_added ? one->by_added + batch * one->added_batch : NULL;
    for (int64_t c = 0; c < channels; c++) {
        scratch[c] = rate[c] * one->weight[c];
        level[c] = scratch[c] * by_bias[c] / count;
        slant[c] = scratch[c] * rate[c] * by_weight[c] / count;
    }
    arrive(one, batch, mean, scratch, level, slant, slant + channels, kept, one->added_place);
}

// Add up what the samples have, for some channels, in their order.
void add_samples(const between *one, int64_t first, int64_t from, int64_t to) {
    for (int64_t number = first; number < 3; number++) {
        float *restrict out = one->by_affine + number * one->channels;
        for (int64_t c = from; c < to; c++) out[c] = 0;
        for (int64_t batch = 0; batch < one->batch; batch++) {
            const float *restrict row = of_sample(one, batch, number);
            for (int64_t c = from; c < to; c++) out[c] += row[c];
        }
    }
}

#define EACH(PASS) for (int64_t batch = first; batch < last; batch++) PASS(&one, batch, scratch);

// Do a layer forwards or backwards. Samples are shared by the threads, and channels where samples meet.
void normalise(const between *given, int64_t is_backwards, int64_t threads) {
    between one = *given;
    one.samples = one.scratch + threads * OWN_ROWS * one.channels;
    IN_PARALLEL {
        PART
        float *scratch = one.scratch + part * OWN_ROWS * one.channels;
        int64_t first = one.batch * part / parts, last = one.batch * (part + 1) / parts;
        int64_t from = one.channels * part / parts, to = one.channels * (part + 1) / parts;
        if (one.groups && !is_backwards) {
            EACH(forwards)
        } else if (one.groups) {
            EACH(backwards)
            WAIT
            add_samples(&one, 0, from, to);
        } else if (!is_backwards) {
            EACH(sum_up)
            WAIT
            put_together(&one, from, to);
            WAIT
            EACH(come_out_alike)
        } else {
            EACH(go_back_alike)
            WAIT
            add_samples(&one, 1, from, to);
            WAIT
            EACH(arrive_alike)
        }
    }
}
